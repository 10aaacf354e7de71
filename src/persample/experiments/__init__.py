"""The experiment: real data sets, the paper's two models, training by VOGN and Adam, metrics, figures."""
