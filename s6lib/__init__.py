"""Small-network experiments on MNIST: five ways to regularise, one loop, and what the differences are worth."""
