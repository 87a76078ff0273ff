"""One program on many devices: the mesh, what each axis of it does, the processes and their memory."""
