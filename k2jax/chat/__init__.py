"""Chat templates: found, rendered in a process of their own, and turns as they take them."""
