"""The user's model: walking its modules and its autograd graph, and leaving no trace on it.

`refusals` has what no backend can serve. `isolation` restores the model and `random_state` the generators after a
call; `state` is what the model keeps from one forward pass to the next, of all that is `held` in it. `eager` runs
compiled models eagerly, and `calling` calls model and loss. `modules` and `autograd_graph` walk, `module_calls` records
the calls of layers, `batch_norm_nodes` works around a kernel's misread memory format, and `usage` describes a
parameter's use to `persample.explain`.
"""
