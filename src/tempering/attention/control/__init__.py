"""A profile put in force on a model, proved, and taken away."""
