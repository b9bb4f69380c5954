"""What the tests share: networks, dense oracles, processes."""
