"""The model as functions of its parameters: decoder, attention, loss, generation."""
