"""Several methods on the same fleet, seeds and virtual clock: what is asked, how it is carried out, what came out."""
