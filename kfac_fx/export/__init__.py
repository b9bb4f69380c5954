"""Models and programs of torch.export: capture with example inputs, and taps in a program."""
