"""Conversations: their format as token ids, which of them are trained, and the way back."""
