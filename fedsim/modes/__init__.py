"""When the server waits for whom: synchronous rounds, deadlines, fixed delays, buffers."""
