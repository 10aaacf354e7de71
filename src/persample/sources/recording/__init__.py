"""Recording the forward and backward passes that the user runs.

`recorder` finds where passes begin and end, `forward_pass` is one call of the model. `layer_recorder` serves the
backends with rules for layers, `repeating` those that repeat the pass; `fused` and `hooks` add a `recorder` of their
own. `reduction` checks that the user's loss is a sum or mean over the samples, `reduction_warnings` tells where that is
doubtful, `outputs_check` runs the self-check on a recorded pass, `p_grad` notices changed gradients, `errors` are about
the order of the passes, and `results` holds what comes out.
"""
