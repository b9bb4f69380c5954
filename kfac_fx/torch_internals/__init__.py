"""Private parts of torch, one file a part, each with the reason and the versions it was seen on.

Only this room may import or use names of torch that begin with an underscore. A test of
tests/torch_internals/ fails for each file when torch changes what the file relies on.
"""
