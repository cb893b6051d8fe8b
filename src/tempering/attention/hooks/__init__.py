"""How a temperature reaches a softmax: the routes, and the state that a tempered module carries."""
