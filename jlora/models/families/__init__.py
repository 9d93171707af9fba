"""Model families, one file for each or for a few similar ones; ``registry`` lists them."""
