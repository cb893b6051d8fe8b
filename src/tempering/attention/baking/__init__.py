"""How temperatures are folded into weights: found by experiment, and proved, layer by layer.

folds     beta times the slices of a parameter that belong to a head
isolate   one attention layer alone, on the calls that it received from its model
labels    which slices of a parameter belong to which head's queries, from gradients
search    the parameters to fold in one layer, tried and proved on the layer alone
locate    where a file keeps the rows of a parameter
mark      what a baked model carries about itself
"""
