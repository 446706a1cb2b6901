// Conversations kept in the browser, one entry each, so that two tabs do not overwrite each other's.

const PREFIX = "minimax-m1/conversation/";

/** Return a conversation that nobody has said anything in. */
export function newConversation() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), messages: [] };
}

/** Return what the list shows of all that are kept, the latest first. */
export function listConversations() {
  const found = [];
  for (const key of ours()) {
    const conversation = read(key);
    if (conversation) found.push({ id: conversation.id, title: conversation.title, updated: conversation.updated });
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** Remember which conversation this tab shows, or say which it was before it was reloaded. */
export function openHere(id) {
  try {
    if (id) sessionStorage.setItem("minimax-m1/open", id);
    return sessionStorage.getItem("minimax-m1/open");
  } catch {
    return null;
  }
}

export const loadConversation = (id) => read(PREFIX + id);

export function deleteConversation(id) {
  try {
    localStorage.removeItem(PREFIX + id);
  } catch {
    // nothing was kept
  }
}

export const deleteAll = () => listConversations().forEach(({ id }) => deleteConversation(id));

/**
 * Keep a conversation; return whether there was room. Token-by-token routes are the largest part and the first to go,
 * then the oldest other conversations.
 */
export function saveConversation(conversation) {
  if (conversation.messages.length === 0) return true;
  const first = conversation.messages.find((message) => message.role === "user")?.content ?? "";
  conversation.title = first.trim().replace(/\s+/g, " ").slice(0, 80);
  if (write(conversation)) return true;
  const slim = { ...conversation, messages: conversation.messages.map(withoutTokens) };
  if (write(slim)) return true;
  for (const { id } of listConversations().reverse()) {
    if (id !== conversation.id) deleteConversation(id);
    if (write(slim)) return true;
  }
  return false;
}

const withoutTokens = (message) =>
  message.routing?.tokens ? { ...message, routing: { ...message.routing, tokens: null } } : message;

function write(conversation) {
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    return true;
  } catch {
    return false;
  }
}

function read(key) {
  try {
    const conversation = JSON.parse(localStorage.getItem(key));
    return Array.isArray(conversation?.messages) ? conversation : null;
  } catch {
    return null;
  }
}

function ours() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return [];
  }
}
