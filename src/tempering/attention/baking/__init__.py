"""How temperatures are folded into weights: found by experiment, and proved, layer by layer.

folds            beta times the slices of a parameter that belong to a head
isolated_layer   one attention layer alone, on the calls that it received; its weights, jittered
head_labels      which slices of a parameter belong to which head's queries, from gradients
fold_proof       whether a fold is right, and what is wrong with one that is not
fold_search      the parameters to fold in one layer: candidates, of which one is proved
foldable         what folds into a model, layer by layer, as data
profile_folds    the folds that give a model the temperatures of a profile
comparison       folded weights against the controlled model
widened          a model in float32 a block at a time
bake             what folds into a model, and a folded copy of it
verdict          what folds into a model, proved on its logits
file_rows        where a file keeps the rows of a parameter
bake_mark        what a baked model carries about itself
"""
