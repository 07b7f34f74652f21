"""Conversations: wording, tokens, and the tree of tokens that prompts share."""
