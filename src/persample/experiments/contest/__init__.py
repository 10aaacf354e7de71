"""A fair comparison of methods of uncertainty: the same networks, data, epochs and number of trials for all.

`methods` has how each is trained, and `settings` what each tries. `tasks` plans trials and runs, `training` and
`running` perform one of them, `pool` performs them in processes, `report` draws what came out.
"""
