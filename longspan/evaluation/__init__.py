"""How well a model finds what is hidden in a long context. Without torch."""
