"""The Conductor: decides where every request runs, purely, and a driver that carries its decisions out."""
