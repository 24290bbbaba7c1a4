"""Where joules are read from: one file per kind of meter, and the choice among them."""
