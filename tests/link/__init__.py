"""Hub, agent and trainer as real processes on a bad network, harmed at random: what is lost, what comes twice."""
