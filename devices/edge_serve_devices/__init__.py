"""The hardware room: facts about boards, their accelerators and cameras. It imports edge_serve, never the other way round."""
