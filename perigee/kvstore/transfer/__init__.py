"""Moving payloads between the arenas of store nodes. Workers of the same host need no mover: they map the arena."""
