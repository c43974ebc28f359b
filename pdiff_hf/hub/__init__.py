"""What goes to the Hub and comes from it: pipelines, zoos and their cards."""
