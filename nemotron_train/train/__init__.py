"""The training loop, the train step, and the trainer that connects the parts of a run."""
