"""The Optuna edge, empty so far: space, study and campaign will stand here. The only package to import optuna."""
