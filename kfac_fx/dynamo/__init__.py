"""Models under torch.compile: graphs that Dynamo captures, and a second form of each with taps."""
