"""The cluster in virtual time: the Conductor, batchers and stores are the real ones, and only time is made up."""
