#!/bin/sh
# Makes the secrets of a deployment in a folder, where they are not there yet: make-secrets.sh FOLDER
set -eu
folder=${1:?usage: make-secrets.sh FOLDER}
mkdir -p "$folder"
chmod 0700 "$folder"

random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }
keep() { [ -e "$folder/$1" ] || printf '%s\n' "$2" > "$folder/$1"; }

keep cluster_secret "$(random)"
keep redis_password "$(random)"
keep api_keys "default:$(random)"
# A file that is mounted keeps its mode, and the users in containers are not this one. Here the folder keeps others out.
chmod 0444 "$folder/cluster_secret" "$folder/redis_password" "$folder/api_keys"
