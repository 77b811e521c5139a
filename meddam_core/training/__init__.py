"""Training a DAM: texts and tokens, examples, loss, what is trained, the step, checkpoints. Knows nothing of Ray."""
