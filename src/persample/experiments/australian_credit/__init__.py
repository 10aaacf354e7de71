"""The published comparison of VOGN, Vadam and mean-field variational inference on Australian credit data.

Khan et al., "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", ICML 2018, section 4.2 and
Figure 3, with the settings of the code that was published with it.
"""
