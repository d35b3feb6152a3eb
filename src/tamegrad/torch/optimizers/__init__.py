"""What `attach` knows of optimizers: which one to attach to, what it holds, when it steps, whether it steps at all."""
