"""Where the samples are after an operation that uses no parameter.

`after` tries the ways one after the other, the quickest first: what is known of the operation `by_name` and of where
each dimension goes; whose the indices are, if constants are read or written by them (`by_index`); the same operation on
labels, if it only moves entries (`by_labels`) or adds them up (`by_sums`); or a trial (`by_trial`). What is found is
remembered for the same operation on the same shapes; where it depends on the values of constants (indices, masks,
lengths), for these values; and not at all where it depends on those of samples.

`call` is an operation, `lost` the answer if there is none, `labels` the owner of each entry, and `remembered` says what
goes into the key. `pending` serves rows whose owners are not known yet.
"""
