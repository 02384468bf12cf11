"""What is needed to run the agent as a service: the container's first process, and a compose file."""
