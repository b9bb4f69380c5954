"""Running averages of factors, and what is computed from them."""
