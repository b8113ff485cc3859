"""How cost grows: what a lookup costs, a model that predicts it, and what large fleets do to each process."""
