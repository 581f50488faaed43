"""Everything across containers: what a name means, where containers are, and how one is opened."""
