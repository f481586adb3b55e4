"""The demo: a support desk's world, a base model trained on it, and customers who chat and vote."""
