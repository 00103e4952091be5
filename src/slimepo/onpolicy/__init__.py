"""On-policy training: answers are sampled from the model while it trains, rewarded, and become the rows of a step."""
