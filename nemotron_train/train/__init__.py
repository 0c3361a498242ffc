"""The training loop, the train step, and the trainer that holds a run together."""
