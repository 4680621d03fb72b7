"""A causal language model: its architecture, weights, tokens, forward, scores and answers."""
