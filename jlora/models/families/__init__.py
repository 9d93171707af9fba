"""One file for each family of models, or for a few that differ little; ``registry`` lists them."""
