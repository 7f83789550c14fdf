use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Message {
    role: &'static str,
    content: String,
}

/// The messages so far, the system's first.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    messages: Vec<Message>,
}

/// What a line typed at the prompt means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Input {
    Nothing,
    Exit,
    Clear,
    System(String),
    Unknown(String),
    Say(String),
}

impl Input {
    pub fn parse(line: &str) -> Self {
        let line = line.trim();
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match word {
            "" => Self::Nothing,
            "/exit" | "/quit" | "/bye" => Self::Exit,
            "/clear" => Self::Clear,
            "/system" => Self::System(rest.trim().to_owned()),
            _ if word.starts_with('/') => Self::Unknown(word.to_owned()),
            _ => Self::Say(line.to_owned()),
        }
    }
}

impl Conversation {
    pub fn new(system: Option<String>) -> Self {
        let mut conversation = Self::default();
        conversation.system(system.unwrap_or_default());
        conversation
    }

    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    pub fn user(&mut self, content: String) {
        self.messages.push(Message { role: "user", content });
    }

    pub fn assistant(&mut self, content: String) {
        self.messages.push(Message { role: "assistant", content });
    }

    /// Begin again with another system text; none when empty.
    pub fn system(&mut self, content: String) {
        self.messages.clear();
        if !content.is_empty() {
            self.messages.push(Message { role: "system", content });
        }
    }

    /// Keep the system text only.
    pub fn clear(&mut self) {
        self.messages.retain(|message| message.role == "system");
    }

    pub fn forget_last(&mut self) {
        self.messages.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_mean_things() {
        for (line, input) in [
            ("\n", Input::Nothing),
            (" /exit ", Input::Exit),
            ("/clear", Input::Clear),
            ("/system  be brief ", Input::System("be brief".into())),
            ("/system", Input::System(String::new())),
            ("/help me", Input::Unknown("/help".into())),
            ("a /clear day", Input::Say("a /clear day".into())),
        ] {
            assert_eq!(Input::parse(line), input, "{line:?}");
        }
    }

    #[test]
    fn clearing_keeps_the_system_text() {
        let mut conversation = Conversation::new(Some("be brief".into()));
        conversation.user("hello".into());
        conversation.assistant("hi".into());
        conversation.clear();
        assert_eq!(conversation.messages(), [Message { role: "system", content: "be brief".into() }]);
        conversation.system(String::new());
        assert_eq!(conversation.messages(), []);
    }
}
