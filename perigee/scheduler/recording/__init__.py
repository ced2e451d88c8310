"""All that a Conductor hears and says, written so that another one can live through it again."""
