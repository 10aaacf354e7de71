"""Replaying a step: forward pass, backward pass and moments, recorded once as a flat list of ATen operations.

1. Dynamo captures forward pass and loss as a graph with *guards* on all that Python decided: modules, flags, shapes,
   values. Where a guard fails, it captures anew. What its guards leave out is seen by other means, or refused.
2. At the first call of such a graph, the capture of this backend runs over it on tensors without values (`FakeTensor`)
   while `make_fx` writes down every operation, those of the backward pass and of the contributions included. Whatever
   looks at a value fails there, so no decision of that kind gets into the list.
3. The list is run once from where the ordinary call began. Only if it gives the same results, the same state of the
   model and the same random numbers does it serve later calls. The results must be the same bit for bit, so that it
   does not matter when a step is recorded: a run that is killed and resumed begins with ordinary calls again.

A step that fails in 1, 2 or 3 goes the ordinary way, and `Replay.reason` says why.

`replay` serves the calls of a source; `untried` and `patience` say for which of them recording is tried. A `step` is a
model in one state of its attributes, which `namespaces` helps to tell, and has a `graph` for each set of guards.
`dynamo` captures one, `guards` sees to what its guards leave out, `refusals` says what may not be in it. `flat_graph`
writes its operations down, `tidying` leaves out what need not be run, `runners` run the others, and `same_numbers`
compares. `ordinary` and `request` hold what is known of the source and of what is wanted.
"""
