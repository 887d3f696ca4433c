"""``compress``: what the other verbs do, in the order that reaches a goal, each step measured before it is kept."""
