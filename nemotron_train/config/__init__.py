"""What a user asks for: every knob, its checks against nothing but itself, and the errors."""
