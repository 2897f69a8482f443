"""Networks: SAM of any size at any input size, what is injected into it, and the weights it starts from."""
