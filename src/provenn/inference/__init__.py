"""Papers as objects, and what is done with a trained system: predict, evaluate, inspect, export."""
