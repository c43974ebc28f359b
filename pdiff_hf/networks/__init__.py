"""Networks themselves: many at once, their training, their symmetries."""
