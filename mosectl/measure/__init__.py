"""What an edit did: questions and answers, protocols, intervals, perplexity, abilities."""
